"""Adapting a model to labelled images: data, losses, and the training loop of `wsiseg finetune`."""
