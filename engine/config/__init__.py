"""Describe one trial as frozen, validated data, without torch."""
