variables {
  first_monday = "2026-01-05"
  admin_cidr   = "192.0.2.0/24"
  clinic_cidr  = "198.51.100.0/24"
}

run "the_design" {
  command = plan

  assert {
    condition     = length(output.nodes) == 4 && output.nodes["cxr-0"] == "control" && output.nodes["cxr-1"] == "data"
    error_message = "Four machines: one control, one data, two workers."
  }
  assert {
    condition     = length(output.blocks) == 16 && output.gpu_hours_a_week == 72
    error_message = "Two blocks a week for four weeks, each for training and for evaluation: 72 GPU hours a week."
  }
  assert {
    condition     = output.blocks[0].name == "cxr-training-20260106" && output.blocks[0].gpus == 4 && output.blocks[0].start == "2026-01-06T18:00:00Z" && output.blocks[0].end == "2026-01-07T00:00:00Z"
    error_message = "The first block is Tuesday evening, six hours, four GPUs."
  }
  assert {
    condition     = output.gpu_machines == 2 && output.gpu_machines == sum([for b in output.blocks : b.hosts if endswith(b.name, "-20260106")])
    error_message = "Training and evaluation have a machine each, as many as the leases of one block."
  }
  assert {
    condition     = output.schedule.up == "0 18 * * 2,5" && output.schedule.down == "0 0 * * 3,6"
    error_message = "Up on Tuesday and Friday at 18, down at midnight, which is the next day."
  }
  assert {
    condition     = output.floating_ips == { permanent = "cxr-0" } && output.storage_gb == 100
    error_message = "One permanent address, 100 GB."
  }
  assert {
    condition     = alltrue([for rule in output.ingress : rule.cidr != "0.0.0.0/0"])
    error_message = "Nothing is open to the whole internet."
  }
}

run "a_second_address_and_no_evaluation" {
  command = plan
  variables {
    occasional_ip    = true
    gpus             = { training = 4, evaluation = 0 }
    block_days       = [6]
    block_start_hour = 8
  }

  assert {
    condition     = output.floating_ips.occasional == "cxr-3" && length(output.blocks) == 4
    error_message = "The occasional address is the last machine's; no lease for nothing."
  }
  assert {
    condition     = output.gpu_machines == 1
    error_message = "Nothing is evaluated, so nothing is there for it."
  }
  assert {
    condition     = output.schedule.up == "0 8 * * 0" && output.schedule.down == "0 14 * * 0"
    error_message = "Cron's Sunday is 0."
  }
}

run "machines_of_eight" {
  command = plan
  variables {
    gpus_per_host = 8
  }

  assert {
    condition     = output.gpu_machines == 2
    error_message = "4 + 2 GPUs are two leases: six GPUs of one machine of eight are not two machines."
  }
}

run "one_machine" {
  command = plan
  variables {
    nodes = 1
  }
  assert {
    condition     = output.nodes == { "cxr-0" = "control" }
    error_message = "One machine does everything."
  }
}

run "a_tuesday_is_no_monday" {
  command = plan
  variables {
    first_monday = "2026-01-06"
  }
  expect_failures = [var.first_monday]
}

run "not_the_whole_internet" {
  command = plan
  variables {
    admin_cidr = "0.0.0.0/0"
  }
  expect_failures = [var.admin_cidr]
}

run "no_half_machine" {
  command = plan
  variables {
    nodes = 1.5
  }
  expect_failures = [var.nodes]
}
