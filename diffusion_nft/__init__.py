"""DiffusionNFT: online reinforcement learning of text-to-image models on the forward process."""
