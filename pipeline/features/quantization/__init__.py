"""The frozen ResNet in int8."""
