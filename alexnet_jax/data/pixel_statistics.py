"""Sums over pixels, exact, and what the paper makes of them: mean image and colour covariance."""

import cv2
import numpy as np
from jaxtyping import Float64, Int64, UInt8


def outer_sum(image: UInt8[np.ndarray, "H W 3"]) -> Float64[np.ndarray, "3 3"]:
    """Returns the sum over the pixels of RGB's outer product with itself.

    Exact, and ten times as fast as a matrix product: OpenCV's sums of squares take uint8 as it is,
    and 2ab = a² + b² - (a - b)².
    """
    channels = cv2.split(image)
    squares = np.array([cv2.norm(channel, cv2.NORM_L2SQR) for channel in channels])
    outer = np.diag(squares)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        of_difference = cv2.norm(channels[a], channels[b], cv2.NORM_L2SQR)
        outer[a, b] = outer[b, a] = (squares[a] + squares[b] - of_difference) / 2
    return outer


def statistics(
    count: int, image_sum: Int64[np.ndarray, "S S 3"], outer_sum: Float64[np.ndarray, "3 3"]
) -> dict[str, np.ndarray]:
    """Returns the mean image, mean RGB, and eigen-decomposition of the RGB covariance.

    As in `store_files.Store`, in float64. The covariance is over all pixels of all images (2012
    paper, section 4.1).

    Args:
      count: of the images.
      image_sum: their sum.
      outer_sum: sum over all their pixels of RGB's outer product with itself.
    """
    mean_image = image_sum / count
    pixels = count * mean_image.shape[0] * mean_image.shape[1]
    mean = image_sum.sum(axis=(0, 1)) / pixels
    eigenvalues, eigenvectors = np.linalg.eigh(outer_sum / pixels - np.outer(mean, mean))
    eigenvalues, eigenvectors = np.maximum(eigenvalues[::-1], 0), eigenvectors[:, ::-1]
    largest = np.abs(eigenvectors).argmax(axis=0)
    eigenvectors = eigenvectors * np.sign(eigenvectors[largest, range(3)])
    return {
        "mean_image": mean_image,
        "mean_channel": mean,
        "eigenvalues": eigenvalues,
        "eigenvectors": eigenvectors,
    }
