"""The form of the kernel for compute capability 9.0, in Gluon."""
