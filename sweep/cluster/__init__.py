"""Find the machines, and start or join Ray on them."""
