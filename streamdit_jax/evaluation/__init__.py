"""Judging what a model makes: autoencoder fidelity, probes of the prompted factors, figures."""
