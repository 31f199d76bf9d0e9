"""Classification of images and clips: training, evaluation, predictions."""
