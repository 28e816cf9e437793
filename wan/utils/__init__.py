"""Errors, files and devices: what every floor uses."""
