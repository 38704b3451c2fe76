"""Adapters: a few trained parameters beside frozen ones, at the memory they need and in peft's file format."""
