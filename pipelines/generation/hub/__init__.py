"""Folders that diffusers loads with one call, for the hub."""
