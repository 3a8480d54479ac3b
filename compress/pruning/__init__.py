"""Structured pruning: labels on every axis position, criteria, selection, rewriting."""
