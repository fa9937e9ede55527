"""Hold frozen weights in 4 bits and share them between processes."""
