"""What runs on images: a timm ViT as stem, blocks and norm, the student, their FLOPs, and the student as a file.

The frozen teacher's weights and where they live are in teacher/; losses are in matching/.
"""
