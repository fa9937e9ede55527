"""Describe one sweep as frozen data, and compose it from conf/."""
