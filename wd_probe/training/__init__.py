"""The same on timm's models: what a run is made of, and one run of training or of a scan."""
