"""The test suite, and the devices that it runs on."""
