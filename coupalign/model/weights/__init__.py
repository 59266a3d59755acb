"""Pretrained weights from other projects' files, checked tensor by tensor.

file, folder or hub name -> path -> {name in the file: tensor}      files, darknet
names in the file -> names in the model                             names
pair the tensors, compare their shapes                              match
copy them into the model, or raise and change nothing               load
say what became of every tensor, and warn of leaks                  report, detectors
"""
