"""The parts of a scene: concepts with their regions and strengths, mask images, and the sizes and rows of a call."""
