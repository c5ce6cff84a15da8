"""Worst-case and average-case sharpness of a network: how much the loss rises when the weights move within a ball.

    kappa(w, rho) = max L(w + delta) - L(w)  over  ||T^-1 delta||_p <= rho,    T = diag(|w|) if adaptive, else I

taken for each batch alone and averaged over batches (m-sharpness with m the batch size), in eval mode. In the
coordinates u = T^-1 delta the ball is the unit ball times rho, the gradient is T g, and a weight that is exactly 0
stays there.

Source: Kwon et al., "ASAM", ICML 2021; Andriushchenko et al., "A modern look at the relationship between sharpness and
generalization", ICML 2023, whose protocol the authors use.
"""
