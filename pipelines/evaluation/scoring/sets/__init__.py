"""Distances between sets of videos: features of whole videos, and what is made of them."""
