"""The demo: real pretrained models, real inputs, one screen of results."""
