"""Prompts: files of them, the jobs they become, and names that are safe to use and to show."""
