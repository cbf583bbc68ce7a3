variables {
  first_monday = "2026-01-05"
  admin_cidr   = "192.0.2.0/24"
  clinic_cidr  = "198.51.100.0/24"
}

run "production_does_not_fit_on_the_design" {
  command = plan
  variables {
    environment = "production"
  }
  expect_failures = [output.capacity]
}

run "production_on_larger_machines" {
  command = plan
  variables {
    environment  = "production"
    machine      = { cores = 8, memory_gb = 16 }
    serving_gpus = 2
  }
  assert {
    condition     = output.capacity.offer == { cores = 30, memory_gb = 60, largest_gb = 15, gpus = 2 } && output.serving == ["cxr-gpu-0", "cxr-gpu-1"]
    error_message = "Four machines with eight processors, and two GPUs that stay."
  }
}

run "production_without_gpus" {
  command = plan
  variables {
    environment = "production"
    machine     = { cores = 8, memory_gb = 16 }
  }
  expect_failures = [output.capacity]
}

run "the_largest_pod_has_to_fit_on_one_machine" {
  command = plan
  variables {
    environment = "development"
    nodes       = 20
    machine     = { cores = 2, memory_gb = 4 }
  }
  expect_failures = [output.capacity]
}

run "leases_are_for_whole_machines" {
  command = plan
  variables {
    gpus = { training = 6, evaluation = 2 }
  }
  assert {
    condition     = output.blocks[0].gpus == 6 && output.blocks[0].hosts == 2 && output.blocks[1].gpus == 2 && output.blocks[1].hosts == 1
    error_message = "Six GPUs are two machines of four, two are one."
  }
}

run "staging_on_the_small_machines" {
  command = plan
  variables {
    environment  = "staging"
    serving_gpus = 1
  }
  assert {
    condition     = output.capacity.offer.cores == 6
    error_message = "Half a processor of each machine is the system's own."
  }
}

run "development_on_two_machines" {
  command = plan
  variables {
    environment = "development"
    nodes       = 2
    machine     = { cores = 4, memory_gb = 8 }
  }
  assert {
    condition     = output.capacity.offer.largest_gb == 7
    error_message = "One GB of each machine is the system's own."
  }
}
