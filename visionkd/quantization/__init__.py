"""Quantised training and storage."""
