"""Splitting schemes composed from block matrices in NumPy: what the shipped letters must agree with."""

import numpy as np


def compose(scheme, precision, mass, h, gamma, T, spread):
    """Give transition and noise covariance of one step in (theta, p), with an independent gradient for each kick.

    The letters follow their stochastic differential equations: A and B are drifts, O and U exact flows, E one Euler step
    of O. ``mass`` holds the diagonal.
    """
    d = len(mass)
    eye, zero, M, W = np.eye(d), np.zeros((d, d)), np.diag(mass), np.diag(1 / mass)
    transition, covariance = np.eye(2 * d), np.zeros((2 * d, 2 * d))
    for letter in scheme:
        t = h / scheme.count(letter)
        e = np.exp(-gamma * t)
        noise = np.zeros((2 * d, 2 * d))
        if letter == "A":
            move = np.block([[eye, t * W], [zero, eye]])
        elif letter == "B":
            move = np.block([[eye, zero], [-t * precision, eye]])
            noise[d:, d:] = t**2 * spread**2 * eye
        elif letter == "O":
            move = np.block([[eye, zero], [zero, e * eye]])
            noise[d:, d:] = T * (1 - e**2) * M
        elif letter == "E":
            move = np.block([[eye, zero], [zero, (1 - gamma * t) * eye]])
            noise[d:, d:] = 2 * gamma * T * t * M
        elif letter == "U":
            move = np.block([[eye, (1 - e) / gamma * W], [zero, e * eye]])
            noise[:d, :d] = T * 2 / gamma * (t - 2 * (1 - e) / gamma + (1 - e**2) / (2 * gamma)) * W
            noise[:d, d:] = noise[d:, :d] = T * (1 - e) ** 2 / gamma * eye
            noise[d:, d:] = T * (1 - e**2) * M
        transition = move @ transition
        covariance = move @ covariance @ move.T + noise
    return transition, covariance
