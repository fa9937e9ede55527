"""Show a running sweep to others, through MLflow and Prometheus."""
