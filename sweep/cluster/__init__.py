"""The machines there are, and a Ray that is started or joined."""
