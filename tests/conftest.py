"""What holds for all tests."""

from hypothesis import settings

# A deadline for an example says how busy the machine is, and nothing about the code.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")
