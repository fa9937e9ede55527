"""Serve the live page of one or more sweeps on this machine alone."""
