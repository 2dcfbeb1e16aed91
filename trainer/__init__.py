"""Distributed training of paired image-to-image translation (pix2pix) on TensorFlow and Keras 3."""

__version__ = "0.1.0"
