"""The training program behind train.py: timm models, distributed, on the bundled digits or an image folder."""
