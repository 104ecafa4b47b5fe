"""Readers of the usual caption formats (COCO, Flickr8k, Karpathy), and what makes checked records of them."""
