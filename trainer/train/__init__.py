"""The training of one generator and one discriminator."""
