"""What others see of a sweep while it runs: MLflow, Prometheus."""
