"""One image or one batch: decoded, varied, and made ready on the device."""
