"""Programs compiled for devices that are not here, and what their compilers say of them."""
