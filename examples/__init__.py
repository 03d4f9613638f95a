"""Programs that use bitorch_qlinear as an application would; they are not part of the installed package."""
