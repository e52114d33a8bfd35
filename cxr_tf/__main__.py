"""`python -m cxr_tf` is `cxr-tf`."""

from cxr_tf.cli import main

main()
