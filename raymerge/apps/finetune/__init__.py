"""Training experts and the joint multi-task reference from labelled images."""
