"""Pretrained weights from other projects' files, checked tensor by tensor."""
