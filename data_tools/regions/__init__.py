"""Region extraction: detectors and backbones that turn pictures into features, boxes, class probabilities."""
