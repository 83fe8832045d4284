"""An extractor that counts its calls."""


class Counting:
    """The first three pixels."""

    name, fingerprint, calls = "counting", "a", 0

    def __call__(self, images):
        self.calls += 1
        return images.flatten(1)[:, :3]
