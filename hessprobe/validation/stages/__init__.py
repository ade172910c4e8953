"""The stages of a validation, a file each; every one yields its figures as it comes to them."""
