"""This room measures training steps of mixtures of experts, ours next to those of other libraries."""
