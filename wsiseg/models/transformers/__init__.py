"""Models of the package ``transformers``, the extra ``[transformers]``: SAM 2.1 and SAM 3. Nothing else imports that package."""
