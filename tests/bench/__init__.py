"""Tests of the sink and of the measuring tools."""
