"""Int8 quantization of the frozen ResNet, without calibration images."""
