"""Replaying golden vectors: is what we compute what the reference computed?"""
