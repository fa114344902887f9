"""What a trained model can do, measured on held-out data, as numbers and as a picture."""
