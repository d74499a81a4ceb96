"""Backbones: inputs to hidden states."""
