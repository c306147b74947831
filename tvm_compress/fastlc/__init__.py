"""Fast LC: compression by learning-compression on a quadratic model of the loss, without data.

Source: Carreira-Perpinan and Zharmagambetov, "Fast model compression"; docs/fastlc.md.
"""
