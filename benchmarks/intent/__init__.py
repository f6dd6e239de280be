"""The intent decoder, measured."""
