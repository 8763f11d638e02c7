"""Tests of compose/."""
